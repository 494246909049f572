"""What models are judged on: bundled text and multiple-choice slices, the user's prompts, and the rules for answers."""
