"""What a run writes and goes on from: files, folders, and whether they belong to it."""
