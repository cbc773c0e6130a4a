"""Files: reached below an open folder, whatever a client put there, and written durably."""
