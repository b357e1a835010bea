"""What commands read from the command line: their parser, the options of a data format, the fields of a recipe."""
