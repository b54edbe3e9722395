"""One file an operation: its cases, contenders and floor."""
