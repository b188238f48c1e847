"""Other ways to run a decoder's layers than as the modules they are."""
