"""What else regularizes a network, each in its authors' form and a few lines long; not part of the package."""
