"""What every part of the library may use: errors, files, names, registries, facts about the machine."""
