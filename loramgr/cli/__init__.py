"""The command line: parse, call one use case of the workspace, show the record it returns."""
