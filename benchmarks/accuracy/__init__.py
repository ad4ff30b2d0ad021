"""What it does for accuracy."""
