"""The operations that are compiled for CPUs: their sources in C++, and their callers."""
