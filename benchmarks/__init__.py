"""Speed, memory, accuracy and robustness, measured; results/ holds what the README quotes."""
