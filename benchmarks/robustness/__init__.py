"""How robust it makes a network, and how hard the tests of that are."""
