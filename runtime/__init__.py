"""All that makes a run survive and be read: files, options, data, evaluation, reports. Never imports the method."""
