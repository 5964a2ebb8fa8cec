"""Experiments over kdjax's public API; each is a script with a frozen config and a short main."""
