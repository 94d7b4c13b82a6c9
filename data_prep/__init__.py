"""From the world's data sets to verified shards of Documents."""
