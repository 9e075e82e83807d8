"""All that ends in an archive: weights, classes, architectures, export, packing."""
