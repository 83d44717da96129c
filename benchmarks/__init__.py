"""Measurements of what this project says about its own speed; nothing here is imported by the product."""
