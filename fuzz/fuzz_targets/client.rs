#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbdcaptive_fuzz_entries::client(data));
