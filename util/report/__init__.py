"""The HTML report: `page.write_report(folders.read_folders(paths), output_dir)`."""
