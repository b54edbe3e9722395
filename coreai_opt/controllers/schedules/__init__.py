"""Levels as functions of steps and epochs."""
