"""What follows the user's points and box through the frames, and the filter of unstable points."""
