"""What can be seen in, and found by, visual words?"""
