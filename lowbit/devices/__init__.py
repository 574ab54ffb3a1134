"""What can run a file that is not this process."""
