"""Pathfinder images of Long Range Arena: how they are drawn, kept and read."""
