"""Arrays in, one statistic an item out. Knows no network, no images, no files."""
