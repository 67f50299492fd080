"""One page about a run: is it healthy, and what has it learned?"""
