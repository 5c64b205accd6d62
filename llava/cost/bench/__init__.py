"""What methods cost on the clock: a model's phases timed by turns, and where time goes that FLOPs do not explain."""
