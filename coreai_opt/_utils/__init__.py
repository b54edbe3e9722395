"""Mechanisms shared by the parts of the package."""
