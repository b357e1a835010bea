"""What a command prints and writes: streams, and the paths of files and folders."""
