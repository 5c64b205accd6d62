"""Images and clips that data names, which nobody vouches for: where their names may lead, and how they are read."""
