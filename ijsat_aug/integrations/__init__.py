"""Thin adapters to other libraries: a module imports its library, and nothing else imports it."""
