"""Results as tables to read, and as JSON or CSV for scripts."""
