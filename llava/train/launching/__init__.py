"""Starting the processes of a run, handing them signals, and their end."""
