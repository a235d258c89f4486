"""RKSC (arXiv 2606.09937) on branches: what they share, how they are verified, what need not be computed."""
