"""Pictures to tokens: views, encoders and their maps, deformable attention over maps, the resampler."""
