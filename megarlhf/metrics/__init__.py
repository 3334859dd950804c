"""What a run tells about itself: metric names, timers, sinks and the report at its end."""
