"""Measurements of memory and time; each ends with one line of JSON."""
