"""What a command prints and writes: streams, errors, and the paths of files and folders."""
