"""Plain torch definitions of every operation: what the other backends must reproduce bit for bit."""
