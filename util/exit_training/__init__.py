"""Teaching exit adapters: the text of a frozen model, its states on disk, the loop, what it will bring."""
