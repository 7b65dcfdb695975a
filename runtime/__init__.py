"""What makes a run survive: options, setup, folder, ranks, FSDP, progress. Nothing here imports the method."""
