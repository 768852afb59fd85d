"""The command line: parses, calls one function of the library, and prints what it returns."""
