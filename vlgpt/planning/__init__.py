"""What a run will need before anything is downloaded: parameters, memory, FLOPs, hours and disk, from shapes alone."""
