"""Long Range Arena: sequences of up to 4,000 tokens and their classes (Tay et al., 2021)."""
