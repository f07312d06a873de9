"""What the commands do, one file each; cli.py has their arguments."""
