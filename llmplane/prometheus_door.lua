-- Port 15090: metrics of requests are shown by their own names, without Envoy's prefix.
--
-- Envoy puts `envoy_` in front of every name. Ours have the mark `llmx_` behind it (translator.metrics). Names
-- stand at the beginnings of lines only; what looks like one in the value of a label stays. Buckets are
-- shown as they were written: 0.1, not 0.10000000000000001.

local MARK = "envoy_llmx_"

local function short(number) return ('le="%.12g"'):format(tonumber(number)) end

local function renamed(lines)
  if not lines:find(MARK, 1, true) then return lines end
  local text = "\n" .. lines
  text = text:gsub("\nenvoy_llmx_", "\n"):gsub("\n# TYPE envoy_llmx_", "\n# TYPE ")
  text = text:gsub('le="(%d+%.%d%d%d%d%d%d%d%d%d+)"', short)
  return text:sub(2)
end

function envoy_on_response(handle)
  handle:headers():remove("content-length")
  local held, last = "", nil
  for chunk in handle:bodyChunks() do
    last = chunk
    local size = chunk:length()
    local text = held .. (size > 0 and chunk:getBytes(0, size) or "")
    local cut = text:match("^.*()\n") or 0 -- a line may go on in the next chunk
    held = text:sub(cut + 1)
    chunk:setBytes(renamed(text:sub(1, cut)))
  end
  if last and held ~= "" then
    local size = last:length()
    last:setBytes((size > 0 and last:getBytes(0, size) or "") .. renamed(held))
  end
end
