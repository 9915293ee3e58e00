"""Built-in backends, one a file; loaded through entry points as any other."""
