"""CPU kernels in C++: ``source/`` holds them, ``build.py`` compiles and loads them."""
