"""CPU kernels in C++: ``source/`` holds them, ``build.py`` finds or builds, and loads them."""
