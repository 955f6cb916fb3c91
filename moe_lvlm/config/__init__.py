"""What a run is: typed, frozen, validated settings; YAML with overrides; the dict that DeepSpeed gets."""
