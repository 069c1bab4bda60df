"""A run's folder -> one page about it, or several runs' beside each other."""
