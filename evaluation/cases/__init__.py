"""Further cases of the demonstration: memorised images and an unwanted style."""
