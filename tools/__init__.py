"""What people start: the command line, benchmarks and the coverage sweep."""
