"""Command-line arguments: the parser, options of a data format, fields of a recipe."""
