"""Sessions: streams that are fed, continued, saved and loaded."""
